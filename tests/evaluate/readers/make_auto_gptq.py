"""Makes a GPTQ artifact with AutoGPTQ's own pack and save, from given codes; run by the interpreter that has it.

python make_auto_gptq.py MODEL GIVEN.safetensors OUT BITS GROUP: MODEL a dense Llama for transformers 4.46; GIVEN holds, by module,
`.scales` and `.zeros` [out, groups]; MODEL's weights are scale * (code - zero), so that packing finds the codes.
"""

import sys

import torch
from auto_gptq import BaseQuantizeConfig
from auto_gptq.modeling._utils import pack_model
from auto_gptq.modeling.llama import LlamaGPTQForCausalLM
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(model_folder: str, given_file: str, out: str, bits: int, group: int) -> None:
    config = BaseQuantizeConfig(bits=bits, group_size=group, desc_act=False, sym=False)
    # Not its own from_pretrained, which asks for a GPU before it packs.
    model = AutoModelForCausalLM.from_pretrained(model_folder, torch_dtype=torch.float32)
    wrapped = LlamaGPTQForCausalLM(model, False, config)
    given = load_file(given_file)
    quantizers = {}
    for name, module in wrapped.model.named_modules():
        if f"{name}.scales" in given:
            rows = torch.arange(module.in_features, dtype=torch.int32) // group
            quantizers[name] = (None, given[f"{name}.scales"], given[f"{name}.zeros"], rows)
    pack_model(wrapped.model, quantizers, bits, group, desc_act=False, force_layer_back_to_cpu=True)
    # It writes scales in the dtype of the weights that it packs; readers of its time have them in half precision.
    for buffer_name, buffer in list(wrapped.model.named_buffers()):
        if buffer_name.endswith(".scales"):
            buffer.data = buffer.data.half()
    wrapped._quantized = True
    wrapped.save_quantized(out, use_safetensors=True)


if __name__ == "__main__":
    main(*sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]))
