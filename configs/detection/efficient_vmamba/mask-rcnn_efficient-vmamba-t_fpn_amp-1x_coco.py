"""Mask R-CNN on EfficientVMamba-T, 12 epochs of COCO in mixed precision: published box AP 35.6, mask AP 33.2."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[48, 96, 192, 384]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
