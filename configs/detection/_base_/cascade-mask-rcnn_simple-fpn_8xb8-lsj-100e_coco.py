"""Cascade Mask R-CNN on a plain backbone as in ViTDet: learning rates that decay by layers, mixed precision."""

_base_ = ["mmdet::_base_/models/cascade-mask-rcnn_r50_fpn.py", "./lsj-100e_coco.py"]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

model = dict(
    data_preprocessor=dict(pad_size_divisor=32),
    backbone=dict(
        _delete_=True,
        type="VisionMambaBackbone",
        model_name="",
        img_size=1024,
        drop_path_rate=0.1,
        init_cfg=dict(type="Pretrained", checkpoint="published"),
    ),
    neck=dict(_delete_=True, type="ViTDetFeaturePyramid", in_channels=192, out_channels=256),
    rpn_head=dict(num_convs=2),
    roi_head=dict(
        bbox_head=[
            dict(
                type="Shared4Conv1FCBBoxHead",
                in_channels=256,
                conv_out_channels=256,
                fc_out_channels=1024,
                roi_feat_size=7,
                num_classes=80,
                norm_cfg=dict(type="LayerNorm2d"),
                reg_class_agnostic=True,
                bbox_coder=dict(
                    type="DeltaXYWHBBoxCoder", target_means=[0.0] * 4, target_stds=[std, std, 2 * std, 2 * std]
                ),
                loss_cls=dict(type="CrossEntropyLoss", use_sigmoid=False, loss_weight=1.0),
                loss_bbox=dict(type="SmoothL1Loss", beta=1.0, loss_weight=1.0),
            )
            for std in (1 / 10, 1 / 20, 1 / 30)
        ],
        mask_head=dict(norm_cfg=dict(type="LayerNorm2d")),
    ),
)

optim_wrapper = dict(
    type="AmpOptimWrapper",
    constructor="LayerDecayOptimWrapperConstructor",
    paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0), norm=dict(decay_mult=0.0))),
)
