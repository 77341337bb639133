"""The table of bad input: what a user or an attacker may hand over, by class."""

from bad_input import configs, data, ggufs, headers, hubs, indexes, memories, oneliners, options, recipes, tokenizers

TABLE = {
    "header": headers.CASES, "gguf": ggufs.CASES, "index": indexes.CASES, "config": configs.CASES, "tokenizer": tokenizers.CASES,
    "recipe": recipes.CASES, "one-liner": oneliners.CASES, "data": data.CASES, "option": options.CASES,
    "hub": hubs.CASES, "memory": memories.CASES,
}  # fmt: skip
