"""gguf: one file of llama.cpp, with the model's sizes and its tokenizer in it."""
