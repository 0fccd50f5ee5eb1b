"""Mask R-CNN on Vim-T, from scratch on the digit scenes."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

model = dict(
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="vim_tiny_patch16_224",
        out_indices=[23],
        img_size=256,
        class_token="",
        global_pool="avg",
        drop_path_rate=0.1,
    ),
    neck=dict(_delete_=True, type="ViTDetFeaturePyramid", in_channels=192),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)),
)
