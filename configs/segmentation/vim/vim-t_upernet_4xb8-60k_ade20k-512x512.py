"""UPerNet on Vim-T, 60k iterations of ADE20K: published mIoU 41.0."""

_base_ = "./_base_/upernet_4xb8-60k_ade20k-512x512.py"

model = dict(
    backbone=dict(model_name="vim_tiny_patch16_224", class_token="", global_pool="avg", feature_stream="mixer"),
    neck=dict(channels=192),
    decode_head=dict(in_channels=[192] * 4, channels=192),
    auxiliary_head=dict(in_channels=192),
)

# The authors' decay by layers reaches the embeddings only: it looks for blocks under another name.
embeddings = dict(lr_mult=0.92**25)
optim_wrapper = dict(
    optimizer=dict(lr=2e-4, weight_decay=0.1),
    paramwise_cfg=dict(custom_keys=dict(patch_embed=embeddings, pos_embed=embeddings)),
)
