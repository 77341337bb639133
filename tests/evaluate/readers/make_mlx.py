"""mlx-lm as the maker of an artifact, run in the environment of its reader.

python make_mlx.py MODEL OUT BITS GROUP: quantizes a dense model as `mlx_lm.convert -q` does, without a tokenizer.
"""

import sys
from pathlib import Path

from mlx_lm.utils import load_model, quantize_model, save_config, save_model

source, out, bits, group = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
model, config = load_model(source)
model, config = quantize_model(model, config, group, bits)
save_model(out, model)
save_config(config, out / "config.json")
