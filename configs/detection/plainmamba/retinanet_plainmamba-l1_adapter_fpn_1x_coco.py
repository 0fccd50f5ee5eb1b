"""RetinaNet on PlainMamba-L1, 12 epochs of COCO: published box AP 41.7."""

_base_ = "./_base_/retinanet_adapter_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="plainmamba_l1", num_heads=6, drop_path_rate=0.1),
    neck=dict(in_channels=[192] * 4),
)
