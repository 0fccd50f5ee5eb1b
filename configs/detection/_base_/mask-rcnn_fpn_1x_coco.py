"""Mask R-CNN with a feature pyramid, 12 epochs of COCO at 1333x800, 8 GPUs of 2 images, as for Swin."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/datasets/coco_instance.py",
    "./schedules/adamw_1x.py",
    "mmdet::_base_/default_runtime.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="",
        drop_path_rate=0.2,
        init_cfg=dict(type="Pretrained", checkpoint="published"),
    ),
    neck=dict(in_channels=[96, 192, 384, 768]),
)
