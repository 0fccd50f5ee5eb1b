"""Mask R-CNN on LocalVMamba-T, 12 epochs of COCO in mixed precision: published box AP 46.7, mask AP 42.2."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="local_vssm_tiny", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
