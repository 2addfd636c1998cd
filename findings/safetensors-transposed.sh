#!/usr/bin/env bash
# Guessed: saving a transposed view of a NumPy array and loading it again gives the view's values, as it does
#   with numpy.save, or else an error.
# Happens: safetensors 0.8.0 writes the memory as it lies there under the view's shape. The values come back
#   in other places, and neither saving nor loading says so. 0.7.0 writes the right ones.
# Versions: safetensors 0.8.0 against 0.7.0, numpy 2.4.6.
# Matters: weights that are kept transposed, or sliced out of a flat buffer by columns, as shards of a
#   parallel run are, become a checkpoint that loads, with the right shapes, and is wrong.
# Instead: numpy.ascontiguousarray before saving.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"

cat > "$folder/look.py" <<'EOF'
import sys

import numpy as np
import safetensors
from safetensors.numpy import load, save

expected = sys.argv[1]
weights = np.arange(6, dtype=np.float32).reshape(2, 3)
views = {"transposed": weights.T, "every other column": weights[:, ::2], "made contiguous": weights.T.copy()}
for name, view in views.items():
    back = load(save({"weights": view}))["weights"]
    told = "the same" if np.array_equal(back, view) else "other values"
    print(f"safetensors {safetensors.__version__}, {name}: {view.tolist()} -> {back.tolist()}, {told}")
    if told != ("the same" if name == "made contiguous" else expected):
        sys.exit(f"changed: {expected} was expected")
EOF
pip=("$folder/venv/bin/pip" install -q --disable-pip-version-check)
"${pip[@]}" numpy==2.4.6 safetensors==0.7.0
"$folder/venv/bin/python" "$folder/look.py" "the same"
"${pip[@]}" safetensors==0.8.0
"$folder/venv/bin/python" "$folder/look.py" "other values"
