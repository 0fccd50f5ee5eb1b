"""Mask R-CNN on VMamba-T s1l8, from scratch on the digit scenes."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(_delete_=True, type="VisionMambaBackbone", model_name="vmamba_tiny_s1l8", drop_path_rate=0.1),
    neck=dict(in_channels=[96, 192, 384, 768]),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)),
)
