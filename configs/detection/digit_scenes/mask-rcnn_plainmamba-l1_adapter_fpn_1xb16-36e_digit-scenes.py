"""Mask R-CNN on PlainMamba-L1 with its adapter, from scratch on the digit scenes."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaAdapter",
        model_name="plainmamba_l1",
        drop_path_rate=0.1,
        norm_cfg=dict(type="BN"),
    ),
    neck=dict(in_channels=[192] * 4),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)),
)
