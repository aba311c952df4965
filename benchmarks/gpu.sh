#!/usr/bin/env bash
# Everything that is measured on a GPU, one file for each measurement.
#
#   benchmarks/gpu.sh [FOLDER [NAME ...]]
#
# FOLDER (benchmarks/results) gets NAME.json, the measurement's last line, and NAME.txt, what it printed. Without names
# all of them run, those for two GPUs where there are two; `benchmarks/gpu.sh --list` prints the names. One that fails
# or takes longer than its limit leaves the others alone; the exit status is 1 when there was one.
#
#   PYTHON   an interpreter that has the requirements; without it ./tessera runs in its own environment
#   STORAGE  where the shapes' random weights are kept for the next call (/tmp/tessera-shapes; 7b: not kept)
set -uo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

storage=${STORAGE:-/tmp/tessera-shapes}
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l)
chosen=()
failed=()
known=()

tessera() { # COMMAND ARGUMENT ...
    if [ -n "${PYTHON:-}" ]; then
        command=("$PYTHON" -m cli "$@")
    else
        command=(./tessera "$@")
    fi
}

is_one_of() { # NAME OTHER ...: in the shell itself, since `printf | grep -q` fails when grep is done first
    local other
    for other in "${@:2}"; do
        [ "$other" = "$1" ] && return 0
    done
    return 1
}

is_chosen() { # NAME GPUS: named, or nothing is and there are GPUs enough
    is_one_of "$1" "${chosen[@]+"${chosen[@]}"}" && return
    [ ${#chosen[@]} -eq 0 ] && [ "$gpus" -ge "$2" ]
}

say() { # NAME TEXT
    printf '%-28s %s\n' "$1" "$2"
}

record() { # NAME SECONDS, of `command`
    local started=$SECONDS code last
    timeout --foreground --signal=INT --kill-after=20 "$2" "${command[@]}" >"$out/.$1.stdout" 2>"$out/$1.txt"
    code=$?
    last=$(tail -n 1 "$out/.$1.stdout")
    rm -f "$out/$1.json"
    if [ "${last#\{}" != "$last" ]; then
        printf '%s\n' "$last" >"$out/$1.json"
        sed '$d' "$out/.$1.stdout" >>"$out/$1.txt"
    else
        cat "$out/.$1.stdout" >>"$out/$1.txt"
    fi
    rm -f "$out/.$1.stdout"
    if [ $code -eq 0 ]; then
        say "$1" "$((SECONDS - started)) s"
        return
    fi
    failed+=("$1")
    if [ $code -eq 124 ] || [ $code -eq 137 ]; then
        say "$1" "ended after its limit of $2 s"
    else
        say "$1" "FAILED ($code) after $((SECONDS - started)) s: $(tail -n 1 "$out/$1.txt")"
    fi
}

measure() { # NAME GPUS SECONDS KIND ARGUMENT ...
    known+=("$1")
    [ -n "$listing" ] && return
    is_chosen "$1" "$2" || return
    tessera bench "${@:4}" --json
    record "$1" "$3"
}

evaluate() { # NAME SECONDS DATA ARGUMENT ...
    known+=("$1")
    [ -n "$listing" ] && return
    is_chosen "$1" 1 || return
    tessera eval "${@:3}" --device cuda --gpu-memory 12000 --storage "$storage" --json
    record "$1" "$2"
}

decode() { # NAME SECONDS SHAPE ARGUMENT ...
    measure "$1" 1 "$2" decode --shape "$3" --device cuda --context 1024 --storage "$storage" "${@:4}"
}

run_tests() { # those that need a GPU; their last line is no JSON, so one is made of it
    known+=(tests)
    [ -n "$listing" ] && return
    is_chosen tests 1 || return
    local python=${PYTHON:-.venv/bin/python}
    command=("$python" -m pytest -m gpu -q --color=no)
    record tests 600
    printf '{"tests": "%s"}\n' "$(tail -n 1 "$out/tests.txt" | tr -d '"\134')" >"$out/tests.json"
}

run_all() {
    local fp16=(--precision fp16) qwen=qwen2-vl-2b place=(--device cuda --storage "$storage")
    local stock=("${fp16[@]}" --kernel-fusion off)
    local fused=(--precision int8 --kernel-fusion on)

    decode decode-plain 240 $qwen "${stock[@]}" --batch 1,8,32,64,128 --profile
    decode decode-mixed 240 $qwen "${stock[@]}" --batch 1,8,32,64,128 --sampling mixed
    decode decode-constrained 180 $qwen "${fp16[@]}" --batch 1,32 --sampling constrained
    decode decode-constrained-int8 180 $qwen "${fused[@]}" --batch 1,32 --sampling constrained
    decode decode-mrope 240 $qwen "${stock[@]}" --batch 1,8,32,64,128 --rotary mrope
    decode decode-int8 240 $qwen --precision int8 --kernel-fusion off --batch 1,8,32,64,128
    decode decode-int8-kv 240 $qwen "${stock[@]}" --kv-precision int8 --batch 1,8,32,64,128
    decode decode-fp32 180 $qwen --precision fp32 --batch 1,8 --steps 24
    decode decode-qwen3-vl-2b 180 qwen3-vl-2b "${stock[@]}" --batch 1,32 --steps 32
    decode decode-smolvlm-256m 180 smolvlm-256m "${stock[@]}" --batch 1,32 --steps 32
    decode decode-smolvlm-2.2b 180 smolvlm-2.2b "${stock[@]}" --batch 1,32 --steps 32
    measure decode-qwen2.5-vl-7b 1 400 decode --shape qwen2.5-vl-7b --device cuda "${stock[@]}" --context 1024 \
        --batch 1,32 --steps 32 # 30 GB on disk, for as long as it runs
    decode decode-fused-int8 240 $qwen "${fused[@]}" --batch 1,8,32,64,128 --profile
    decode decode-fused-int8-mixed 240 $qwen "${fused[@]}" --batch 1,8,32,128 --sampling mixed
    decode decode-fused-int8-kv 240 $qwen "${fused[@]}" --kv-precision int8 --batch 1,8,32,64,128
    decode decode-fused-fp16 240 $qwen "${fp16[@]}" --kernel-fusion on --batch 1,8,32,64,128
    decode decode-fused-smolvlm-256m 180 smolvlm-256m "${fused[@]}" --batch 1,32
    decode decode-fused-qwen3-vl-2b 180 qwen3-vl-2b "${fused[@]}" --batch 1,32
    decode decode-fused-qwen3-vl-2b-kv 180 qwen3-vl-2b "${fused[@]}" --kv-precision int8 --batch 1,32
    measure kernels 1 400 kernels --shape $qwen "${place[@]}" --only kernels
    measure step-ladder 1 590 kernels --shape $qwen "${place[@]}" --only ladder
    measure prefill 1 240 prefill --shape $qwen "${place[@]}" "${fp16[@]}" --batch 1,8 --context 512,1024,2048
    measure prefill-int8-fused 1 240 prefill --shape $qwen "${place[@]}" "${fused[@]}" --batch 1,8 \
        --context 512,1024,2048 --profile # against `prefill`
    measure vision 1 240 vision --shape $qwen "${place[@]}" "${stock[@]}" --batch 1,2,4,8,16 --image-size 640x480
    measure vision-smolvlm-256m 1 180 vision --shape smolvlm-256m "${place[@]}" "${stock[@]}" --batch 1,4
    measure vision-smolvlm-256m-int8-fused 1 180 vision --shape smolvlm-256m "${place[@]}" "${fused[@]}" --batch 1,4
    measure start 1 240 start --shape $qwen "${place[@]}" --precision int8 # forgets what was tuned, and tunes again
    decode rival 400 $qwen "${stock[@]}" --batch 1,32 --steps 32 --rival transformers
    measure ttft 1 240 ttft --shape $qwen "${place[@]}" "${fp16[@]}"
    measure serve 1 300 serve --shape $qwen "${place[@]}" "${fp16[@]}" --image-size 640x480 --prompt-tokens 128 \
        --output-tokens 128 --concurrency 64 --requests 960 --trace
    measure ladder-cuda 1 590 ladder --shape $qwen "${place[@]}" --requests 96
    local text=(perplexity --model smollm2-135m --precision int8 --against fp16) # needs requirements-data.txt
    evaluate perplexity-int8 240 "${text[@]}" --activations chosen
    evaluate perplexity-w8a8 120 "${text[@]}" --activations 8
    evaluate perplexity-w8a16 120 "${text[@]}" --activations 16
    evaluate perplexity-decode 120 "${text[@]}" --activations chosen --chunk 1
    evaluate easy-vqa-int8 240 easy-vqa --precision int8 --kernel-fusion on
    evaluate printed-words-int8 240 printed-words --precision int8 --kernel-fusion on
    run_tests
    measure soak 1 590 soak --shape $qwen "${place[@]}" "${fp16[@]}" --minutes 8 --concurrency 64

    local two=(--device 'cuda:0,1' --storage "$storage")
    measure decode-2-gpus 2 240 decode --shape $qwen "${two[@]}" "${fp16[@]}" --context 1024 --batch 1,32,64
    measure serve-2-gpus 2 400 serve --shape $qwen "${two[@]}" --against cuda:0 "${fp16[@]}" --image-size 640x480 \
        --prompt-tokens 128 --output-tokens 128 --concurrency 128 --requests 1280
}

listing=
if [ "${1:-}" = --list ]; then
    listing=yes
    run_all
    printf '%s\n' "${known[@]}"
    exit 0
fi

out=${1:-benchmarks/results}
if [ $# -gt 0 ]; then
    case $out in /*) ;; *) out=$caller/$out ;; esac
    shift
fi
chosen=("$@")
listing=yes
run_all
listing=
for name in "${chosen[@]+"${chosen[@]}"}"; do
    if ! is_one_of "$name" "${known[@]}"; then
        echo "benchmarks/gpu.sh: there is no $name; there are: ${known[*]}" >&2
        exit 2
    fi
done
if [ ${#chosen[@]} -eq 0 ] && [ "$gpus" -eq 0 ]; then
    echo "benchmarks/gpu.sh: nvidia-smi shows no GPU; name a measurement to try it all the same" >&2
    exit 2
fi
mkdir -p "$out" || exit 1
run_all
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
