"""Mask R-CNN on a plain backbone as in ViTDet."""

_base_ = ["mmdet::_base_/models/mask-rcnn_r50_fpn.py", "./lsj-100e_coco.py"]
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
        bbox_head=dict(type="Shared4Conv1FCBBoxHead", conv_out_channels=256, norm_cfg=dict(type="LayerNorm2d")),
        mask_head=dict(norm_cfg=dict(type="LayerNorm2d")),
    ),
)
