"""Mask R-CNN on a plain model with its adapter, 12 epochs of COCO at 1333x800, 8 GPUs of 2 images."""

_base_ = "../../_base_/mask-rcnn_fpn_1x_coco.py"

model = dict(
    backbone=dict(type="VisionMambaAdapter", model_name="plainmamba_l1", num_heads=6, drop_path_rate=0.1),
    neck=dict(in_channels=[192] * 4, norm_cfg=dict(type="SyncBN")),
    roi_head=dict(
        bbox_head=dict(
            type="Shared4Conv1FCBBoxHead",
            conv_out_channels=256,
            norm_cfg=dict(type="SyncBN"),
            reg_class_agnostic=False,
        )
    ),
)

param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1),
]
without_decay = ("pos_embed", "level_embed", "norm", "bias", "A_log", ".D", "direction_B", "gamma")
optim_wrapper = dict(
    paramwise_cfg=dict(custom_keys={name: dict(decay_mult=0.0) for name in without_decay}),
)
