"""UPerNet on Vim-T, 60k iterations of ADE20K: published mIoU 41.0."""

_base_ = "../_base_/upernet_8xb2-160k_ade20k-512x512.py"

model = dict(
    backbone=dict(
        model_name="vim_tiny_patch16_224",
        img_size=512,
        class_token="",
        global_pool="avg",
        feature_stream="mixer",
        drop_path_rate=0.0,
    ),
    neck=dict(type="VisionMambaFeaturePyramid", channels=192, norm_cfg=dict(type="SyncBN")),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
    test_cfg=dict(mode="slide", crop_size=(512, 512), stride=(341, 341)),
)

# The authors' decay by layers reaches the embeddings only: it looks for blocks under another name.
embeddings = dict(lr_mult=0.92**25)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(
        custom_keys=dict(
            patch_embed=embeddings, pos_embed=dict(decay_mult=0.0, **embeddings), norm=dict(decay_mult=0.0)
        )
    ),
)
param_scheduler = [
    dict(type="LinearLR", start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type="PolyLR", eta_min=0.0, power=1.0, begin=1500, end=60000, by_epoch=False),
]
train_cfg = dict(max_iters=60000, val_interval=6000)
default_hooks = dict(checkpoint=dict(interval=6000))
train_dataloader = dict(batch_size=8)
