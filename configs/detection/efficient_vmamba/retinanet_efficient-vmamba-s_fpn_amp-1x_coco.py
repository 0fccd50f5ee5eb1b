"""RetinaNet on EfficientVMamba-S, 12 epochs of COCO in mixed precision: published box AP 39.1."""

_base_ = "../_base_/retinanet_fpn_1x_coco.py"

model = dict(
    backbone=dict(model_name="efficient_vmamba_small", drop_path_rate=0.2),
    neck=dict(in_channels=[64, 128, 256, 512]),
)
optim_wrapper = dict(type="AmpOptimWrapper")
