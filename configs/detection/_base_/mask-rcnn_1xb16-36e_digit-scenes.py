"""Mask R-CNN on the digit scenes, trained from scratch on one GPU."""

_base_ = [
    "mmdet::_base_/models/mask-rcnn_r50_fpn.py",
    "mmdet::_base_/default_runtime.py",
    "../../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

few_proposals = dict(nms_pre=500, max_per_img=200)  # a scene has at most six digits
model = dict(
    backbone=dict(_delete_=True, type="VisionMambaBackbone", model_name="", drop_path_rate=0.1),
    neck=dict(norm_cfg=dict(type="BN")),
    roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10, norm_cfg=dict(type="BN"))),
    train_cfg=dict(rpn_proposal=few_proposals, rcnn=dict(sampler=dict(num=128))),
    test_cfg=dict(rpn=few_proposals, rcnn=dict(max_per_img=30)),
)

load = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations", with_bbox=True, with_mask=True)]
resize = dict(type="Resize", scale=(256, 256), keep_ratio=True)
pack = dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor"))
scenes = dict(type="CocoDataset", metainfo=dict(classes=tuple("0123456789")))
train_dataloader = dict(
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        scenes,
        ann_file="train/annotations.json",
        data_prefix=dict(img="train/images/"),
        pipeline=[*load, resize, dict(type="PackDetInputs")],
    ),
)
val_dataloader = dict(
    dataset=dict(
        scenes,
        ann_file="val/annotations.json",
        data_prefix=dict(img="val/images/"),
        test_mode=True,
        pipeline=[load[0], resize, load[1], pack],
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="CocoMetric", ann_file="data/digit_scenes/val/annotations.json", metric=["bbox", "segm"])
test_evaluator = val_evaluator

train_cfg = dict(type="EpochBasedTrainLoop", max_epochs=36, val_interval=6)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="CosineAnnealingLR", T_max=36, eta_min=3e-6, by_epoch=True, convert_to_iter_based=True),
]
