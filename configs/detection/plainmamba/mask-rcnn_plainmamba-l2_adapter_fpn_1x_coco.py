"""Mask R-CNN on PlainMamba-L2, 12 epochs of COCO: published box AP 46.0, mask AP 40.6."""

_base_ = "./_base_/mask-rcnn_adapter_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="plainmamba_l2", num_heads=6, drop_path_rate=0.2),
    neck=dict(in_channels=[384] * 4),
)
