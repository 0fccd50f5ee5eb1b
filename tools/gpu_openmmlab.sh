#!/usr/bin/env bash
# Detection and segmentation on one GPU: tools/gpu_openmmlab.sh OUT [part ...]
#
# Parts: ops bench det seg families (all by default), each of which fits into ten minutes; det and seg train for TIME seconds
# (180). TINY=1 rehearses everything on the CPU in a few minutes. What is worth keeping is small and lies in OUT/report;
# scenes, logs and checkpoints in OUT/work.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: tools/gpu_openmmlab.sh OUT [part ...]}
shift
parts=${*:-ops bench det seg families}
python=${PYTHON:-python3}
tiny=${TINY:-}
work=$out/work report=$out/report
mkdir -p "$work" "$report"
export PYTHONPATH="${PYTHONPATH:+$PYTHONPATH:}$PWD:$PWD/tools" PYTHONUNBUFFERED=1 PYTHONWARNINGS=ignore
status=0

run() { # name, command...: a log of its own, the last lines shown
  local name=$1 begin=$SECONDS code=0
  shift
  "$@" >"$work/$name.txt" 2>&1 || { code=$?; status=1; }
  echo "== $name: exit $code after $((SECONDS - begin)) s"
  tail -n 4 "$work/$name.txt"
  return $code
}

if [ -n "$tiny" ]; then
  export CUDA_VISIBLE_DEVICES=""
  few=(--train 6 --val 2 --size 96) many=(--train 8 --val 2 --size 96) bench=(--shape 96 128 --steps 1 --warmup 1 --precision float32) seconds=8 short=1 interval=2
  small=(train_dataloader.batch_size=2 train_dataloader.num_workers=0 train_dataloader.persistent_workers=False
    val_dataloader.num_workers=0 val_dataloader.persistent_workers=False test_dataloader.num_workers=0
    test_dataloader.persistent_workers=False default_hooks.logger.interval=2)
  det_small=("${small[@]}" "train_dataloader.dataset.pipeline.2.scale=(96,96)" "val_dataloader.dataset.pipeline.1.scale=(96,96)")
  seg_small=("${small[@]}" "model.data_preprocessor.size=(96,96)")
else
  few=(--workers 12) many=(--train 6000 --val 200 --workers 14) bench=() seconds=${TIME:-180} short=2 interval=10 small=() det_small=()
  seg_small=(optim_wrapper.dtype=bfloat16 --amp) # after --cfg-options' values: mixed precision
fi
det_configs=configs/detection/digit_scenes
main_det=$det_configs/mask-rcnn_vmamba-t-s1l8_fpn_1xb8-3min_digit-scenes.py
main_seg=configs/segmentation/digit_scenes/vmamba-t-s1l8_upernet_1xb64-3min_digit-scenes-256x256.py

scenes() { # name, argument...: the digit scenes that come next; drawn once
  scenes=$work/$1
  [ -d "$scenes" ] || run "$1" "$python" tools/make_digit_scenes.py "$scenes" "${@:2}" || exit 1
}

train() { # det or seg, name, config, option...
  local tool=$1 name=$2 config=$3 data=()
  shift 3
  for split in train val test; do data+=("${split}_dataloader.dataset.data_root=$scenes/"); done
  [ "$tool" = det ] && for split in val test; do data+=("${split}_evaluator.ann_file=$scenes/val/annotations.json"); done
  run "$name" "$python" "tools/${tool}_train.py" "$config" --work-dir "$work/$name" --cfg-options "${data[@]}" \
    default_hooks.logger.interval="$interval" "$@"
}

pictures() { # name: predictions on six scenes that were held out
  rm -rf "$work/held_out" && mkdir -p "$work/held_out" && cp "$scenes"/val/images/00000[0-5].png "$work/held_out" 2>/dev/null
  run "$1_pictures" "$python" tools/infer_folder.py "$work/$1"/*.py "$work/$1"/iter_*.pth "$work/held_out" "$report/$1" --score-thr 0.5
}

for part in $parts; do
  case $part in
    ops) # the operators of mmcv's stand-in, on the device as on the CPU
      run ops "$python" -m pytest -q -p no:cacheprovider tests/openmmlab/test_mmcv_ext.py ;;
    bench)
      run bench "$python" tools/bench_det.py --output "$report/bench.json" "${bench[@]}" ;;
    det)
      scenes scenes "${few[@]}"
      train det det "$main_det" "${det_small[@]}" custom_hooks.0.seconds="$seconds" && pictures det
      run det_report "$python" tools/training_report.py "$report/det_curves" "$work/det" ;;
    seg) # many scenes: it sees ten times as many images as the detector, and would learn two thousand by heart
      scenes many_scenes "${many[@]}"
      train seg seg "$main_seg" custom_hooks.0.seconds="$seconds" "${seg_small[@]}" && pictures seg
      run seg_report "$python" tools/training_report.py "$report/seg_curves" "$work/seg" ;;
    families) # one model of each other family, all at a time, 500 steps of 8 images: the loss has to fall
      scenes scenes "${few[@]}"
      works=() trainings=()
      for config in "$det_configs"/*36e*.py; do
        name=$(basename "$config" _1xb16-36e_digit-scenes.py)
        [ "$name" = mask-rcnn_vmamba-t-s1l8_fpn ] && continue
        train det "$name" "$config" train_dataloader.batch_size=8 "${det_small[@]}" \
          train_cfg.max_epochs="$short" train_cfg.val_interval="$short" param_scheduler.1.T_max="$short" \
          default_hooks.checkpoint.max_keep_ckpts=1 &
        works+=("$work/$name") trainings+=($!)
      done
      for training in "${trainings[@]}"; do wait "$training" || status=1; done
      run families_report "$python" tools/training_report.py "$report/families" "${works[@]}" ;;
    *) echo "$part: not a part; expected ops, bench, det, seg or families" >&2; exit 2 ;;
  esac
done
exit $status
