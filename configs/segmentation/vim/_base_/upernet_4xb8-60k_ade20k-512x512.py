"""UPerNet on Vim, 60k iterations of ADE20K at 512x512 on 4 GPUs of 8 images, tested on sliding windows."""

_base_ = "../../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(img_size=512, drop_path_rate=0.0),
    neck=dict(type="VisionMambaFeaturePyramid", norm_cfg=dict(type="SyncBN")),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(pos_embed=dict(decay_mult=0.0))))
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
train_dataloader = dict(batch_size=8)
