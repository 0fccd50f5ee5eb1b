"""Mask R-CNN on LocalVMamba-T, 36 epochs of COCO in mixed precision: published box AP 48.7, mask AP 43.4."""

_base_ = "../_base_/mask-rcnn_fpn_ms-crop-3x_coco.py"

model = dict(
    backbone=dict(model_name="local_vssm_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
