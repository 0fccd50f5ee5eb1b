"""UPerNet on the digit scenes, trained from scratch on one GPU."""

_base_ = [
    "mmseg::_base_/models/upernet_swin.py",
    "mmseg::_base_/default_runtime.py",
    "../../_base_/digit_scenes.py",
]
custom_imports = dict(imports=["visionmamba.openmmlab"], allow_failed_imports=False)

norm_cfg = dict(type="BN", requires_grad=True)
model = dict(
    data_preprocessor=dict(size=(256, 256)),
    backbone=dict(_delete_=True, type="VisionMambaBackbone", model_name="", drop_path_rate=0.1),
    decode_head=dict(num_classes=11, norm_cfg=norm_cfg),
    auxiliary_head=dict(num_classes=11, norm_cfg=norm_cfg),
)

# no augmentation: every digit's size, place and colour are drawn at random already
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
scenes = dict(
    type="BaseSegDataset",
    metainfo=dict(
        classes=("background", *"0123456789"),
        palette=[[0, 0, 0], *([23 * i % 256, 91 * i % 256, 157 * i % 256] for i in range(1, 11))],
    ),
    img_suffix=".png",
    pipeline=test_pipeline,
)
train_dataloader = dict(
    sampler=dict(type="InfiniteSampler", shuffle=True),
    dataset=dict(scenes, data_prefix=dict(img_path="train/images", seg_map_path="train/labels")),
)
val_dataloader = dict(dataset=dict(scenes, data_prefix=dict(img_path="val/images", seg_map_path="val/labels")))
test_dataloader = val_dataloader
val_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"])
test_evaluator = val_evaluator

train_cfg = dict(type="IterBasedTrainLoop", max_iters=4000, val_interval=1000)
visualizer = dict(alpha=0.5)  # the digits can be seen under their labels
default_hooks = dict(
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=1),
    sampler_seed=dict(type="DistSamplerSeedHook"),
    visualization=dict(type="SegVisualizationHook"),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=200),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=200, end=4000, by_epoch=False),
]
