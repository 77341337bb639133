"""Load a packed artifact without a dense copy of it, and generate.

python examples/generate.py OUT "The capital of France is"
"""

import sys

import torch
from transformers import AutoTokenizer

import compress

artifact, prompt = sys.argv[1:]
# An artifact of pack(format=native); repack=True would take one of another tool, packed anew while it is read.
model = compress.load(artifact)
tokenizer = AutoTokenizer.from_pretrained(artifact)
with torch.no_grad():
    ids = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
