"""Mask R-CNN on LocalVMamba-S, 12 epochs of COCO in mixed precision: published box AP 48.4, mask AP 43.2."""

_base_ = "../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="local_vssm_small", drop_path_rate=0.2),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
