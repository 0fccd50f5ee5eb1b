"""Mask R-CNN on PlainMamba-L3, 12 epochs of COCO: published box AP 46.8, mask AP 41.2."""

_base_ = "./_base_/mask-rcnn_adapter_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="plainmamba_l3", num_heads=8, drop_path_rate=0.3),
    neck=dict(in_channels=[448] * 4),
)
