"""UPerNet on VMamba-T s1l8, from scratch on the digit scenes."""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/default_runtime.py",
    "../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(_delete_=True, type="VisionMambaBackbone", model_name="vmamba_tiny_s1l8", drop_path_rate=0.1),
    decode_head=dict(in_channels=[96, 192, 384, 768], num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=384, num_classes=11, norm_cfg=norm_cfg),
)
