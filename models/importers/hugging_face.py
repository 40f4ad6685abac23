"""Vision models of Hugging Face's transformers, from a local folder of config.json and safetensors.

Read without transformers: ViT, DeiT, DINOv2 with and without registers, BEiT, Swin, and the vision towers of CLIP and
SigLIP, by themselves or within the whole model. A backbone's features are those that transformers calls
``pooler_output`` (of ViT, ``last_hidden_state[:, 0]``: the pooler of BERT's kind behind it is left out); a CLIP with
its projection gives the projected image features.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.layers import GluMlp, LayerNorm
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from prunesweep.models.arch import Arch
from prunesweep.models.errors import UserError
from prunesweep.models.io.reading import read_json
from prunesweep.models.layers.activations import ACTIVATIONS

from .tensors import Given, Tensors, agree
from .translation import join_rows, model_of, record_of, renamed, split_rows

__all__ = ["read_folder", "read_transformers"]

LAYOUT = "transformers"
# what config.json leaves out, by model_type
USUAL: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 16, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "intermediate_size": 3072},
    "deit": {"patch_size": 16, "layer_norm_eps": 1e-12, "hidden_act": "gelu", "intermediate_size": 3072},
    "dinov2": {"patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "mlp_ratio": 4},
    "dinov2_with_registers": {"patch_size": 14, "layer_norm_eps": 1e-6, "hidden_act": "gelu", "mlp_ratio": 4},
    "beit": {
        "patch_size": 16,
        "layer_norm_eps": 1e-12,
        "hidden_act": "gelu",
        "intermediate_size": 3072,
        "layer_scale_init_value": 0.1,
        "use_mean_pooling": True,
    },
    "swin": {"patch_size": 4, "layer_norm_eps": 1e-5, "hidden_act": "gelu", "mlp_ratio": 4.0},
    "clip_vision_model": {
        "patch_size": 32,
        "layer_norm_eps": 1e-5,
        "hidden_act": "quick_gelu",
        "intermediate_size": 3072,
    },
    "siglip_vision_model": {
        "patch_size": 16,
        "layer_norm_eps": 1e-6,
        "hidden_act": "gelu_pytorch_tanh",
        "intermediate_size": 3072,
    },
}
USUAL_VIT = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12}
USUAL_SWIN = {"embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
WHOLE = {"clip": "clip_vision_model", "siglip": "siglip_vision_model"}  # models of images and texts
ACTS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "gelu_pytorch_tanh": "gelu_tanh", "silu": "silu"}
RULES = [
    (r"(text_model|text_projection|logit_scale|logit_bias)\b.*", ""),  # of a whole model of images and texts
    (r"(vit|deit|dinov2|dinov2_with_registers|beit|swin|vision_model)\.", ""),
    (r"embeddings\.(mask_token|position_ids)", ""),  # without effect on images that are seen whole
    (r"pooler\.layernorm\.", "fc_norm."),  # of BEiT
    (r"pooler\..*", ""),
    (r".*relative_position_index", ""),
    (r"embeddings\.(cls_token|class_embedding)", "cls_token"),
    (r"embeddings\.distillation_token", "dist_token"),
    (r"embeddings\.register_tokens", "reg_token"),
    (r"embeddings\.position_embedding(s|\.weight)", "pos_embed"),
    (r"embeddings\.patch_embedding(s\.projection)?\.", "patch_embed.proj."),
    (r"embeddings\.norm\.", "patch_embed.norm."),
    (r"pre_layrnorm\.", "norm_pre."),
    (r"(post_)?layernorm\.", "norm."),
    (r"(classifier|cls_classifier|visual_projection)\.", "head."),
    (r"distillation_classifier\.", "head_dist."),
    (r"encoder\.layers\.(\d+)\.(blocks|downsample)\.", r"layers.\1.\2."),  # Swin
    (r"(encoder\.layer|encoder\.layers)\.(\d+)\.", r"blocks.\2."),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.in_proj_(weight|bias)", r"attn_pool.in.\1"),
    (r"head\.attention\.out_proj\.", "attn_pool.proj."),
    (r"head\.layernorm\.", "attn_pool.norm."),
    (r"head\.mlp\.", "attn_pool.mlp."),
    (r"(.*blocks\.\d+\.)(attention\.attention|attention\.self)\.(query|key|value)\.", r"\1attn.\3."),
    (r"(.*blocks\.\d+\.)attention\.attention\.relative_position_bias\.", r"\1attn.rel_pos."),
    (r"(.*blocks\.\d+\.)self_attn\.([qkv])_proj\.", r"\1attn.\2."),
    (r"(.*blocks\.\d+\.)(attention\.output\.dense|self_attn\.out_proj)\.", r"\1attn.proj."),
    (r"(.*blocks\.\d+\.)attention\.self\.", r"\1attn."),
    (r"(.*blocks\.\d+\.)(layernorm_before|layer_norm1)\.", r"\1norm1."),
    (r"(.*blocks\.\d+\.)(layernorm_after|layer_norm2)\.", r"\1norm2."),
    (r"(.*blocks\.\d+\.)intermediate\.dense\.", r"\1mlp.fc1."),
    (r"(.*blocks\.\d+\.)output\.dense\.", r"\1mlp.fc2."),
    (r"(.*blocks\.\d+\.)layer_scale([12])\.lambda1", r"\1ls\2.gamma"),
    (r"(.*blocks\.\d+\.)lambda_([12])", r"\1ls\2.gamma"),
    (r"(.*blocks\.\d+\.)mlp\.weights_in\.", r"\1mlp.fc1."),
    (r"(.*blocks\.\d+\.)mlp\.weights_out\.", r"\1mlp.fc2."),
]


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Read the weights of a folder by name, on the CPU, and its configurations.

    Args:
        folder: with config.json and model.safetensors, or the shards that model.safetensors.index.json lists.

    Returns:
        The weights, and the content of config.json, with that of preprocessor_config.json as its entry
        ``preprocessor``, where there is one.

    Raises:
        UserError: a file is missing or cannot be read.
    """
    config = _json(folder / "config.json")
    if (folder / "preprocessor_config.json").is_file():
        config["preprocessor"] = _json(folder / "preprocessor_config.json")
    index = folder / "model.safetensors.index.json"
    shards = ["model.safetensors"]
    if index.is_file():
        shards = sorted({Path(str(name)).name for name in dict(_json(index).get("weight_map") or {}).values()})
    weights: dict[str, torch.Tensor] = {}
    for shard in shards:
        if not (folder / shard).is_file():
            raise UserError(f"{folder} has no {shard}: layout {LAYOUT!r} reads config.json and safetensors, no pickles")
        try:
            weights |= load_file(folder / shard)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{folder / shard} cannot be read as safetensors: {error}") from error
    return weights, config


def read_transformers(tensors: Tensors, given: Given) -> nn.Module:
    """Build the model of a folder of transformers.

    Args:
        tensors: the folder's tensors.
        given: ``config`` is the folder's, as by ``read_folder``; ``heads`` and ``img_size`` must agree with it.

    Raises:
        UserError: another model, a part that no record can express, or tensors that do not fit.
    """
    config = dict(given.config or {})
    if not config:
        raise UserError(f"layout {LAYOUT!r} reads a folder with config.json and model.safetensors: give that folder")
    preprocessor, kind = config.pop("preprocessor", {}), config.get("model_type")
    if kind in WHOLE:
        config, kind = dict(config.get("vision_config") or {}), WHOLE[kind]
    if kind not in USUAL:
        raise UserError(f"model_type = {kind!r}: layout {LAYOUT!r} reads {', '.join([*USUAL, *WHOLE])}")
    config = {**(USUAL_SWIN if kind == "swin" else USUAL_VIT), **USUAL[kind], **config}
    weights = renamed(tensors.left, RULES)
    if kind != "beit":
        join_rows(weights, ("attn.query", "attn.key", "attn.value"), "attn.qkv")
    join_rows(weights, ("attn.q", "attn.k", "attn.v"), "attn.qkv")
    try:
        own = {"swin": _swin, "beit": _beit}.get(kind)
        arch = _vit(kind, config, weights) if own is None else own(config, weights)
    except (KeyError, TypeError) as error:
        raise UserError(f"config.json is not one of {kind}: {error}") from error
    agree("img_size", given.img_size, arch.img_size)
    agree("heads", given.heads, given.heads and tuple(dict.fromkeys(block.heads for block in arch.blocks)))
    return model_of(arch, weights, LAYOUT, _preprocessing(preprocessor, config, arch))


def _vit(kind: str, config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Arch:
    """Read the record of a ViT; reshape its tokens and pool as timm has them."""
    width, towers = config["hidden_size"], kind in ("clip_vision_model", "siglip_vision_model")
    if towers:
        for name, shape in (("cls_token", (1, 1, -1)), ("pos_embed", (1, -1, width))):
            if name in weights:
                weights[name] = weights[name].reshape(shape)
    for part in ("weight", "bias"):
        split_rows(weights, f"attn_pool.in.{part}", [(f"attn_pool.q.{part}", 1), (f"attn_pool.kv.{part}", 2)])
    projected = kind == "clip_vision_model" and "head.weight" in weights
    if projected:
        weights.setdefault("head.bias", torch.zeros_like(weights["head.weight"][:, 0]))
    classes = len(weights["head.weight"]) if "head.weight" in weights else 0
    distilled = "dist_token" in weights
    _check_vit(kind, config, weights, distilled=distilled)
    patch = config["patch_size"]
    options: dict[str, Any] = {
        "img_size": config.get("image_size", 224),
        "patch_size": patch,
        "in_chans": config.get("num_channels", 3),
        "num_classes": classes,
        "embed_dim": width,
        "depth": config["num_hidden_layers"],
        "num_heads": config["num_attention_heads"],
        "mlp_ratio": config["mlp_ratio"] if "mlp_ratio" in config else config["intermediate_size"] / width,
        "qkv_bias": bool(config.get("qkv_bias", True)),
        "norm_layer": partial(LayerNorm, eps=config["layer_norm_eps"]),
        "act_layer": ACTIVATIONS[_activation(config)],
    }
    if kind.startswith("dinov2"):
        options["init_values"] = 1.0
    if config.get("use_swiglu_ffn"):
        units = weights["blocks.0.mlp.fc2.weight"].shape[1]
        mlp = {"mlp_layer": partial(GluMlp, gate_last=False), "mlp_ratio": (2 * units + 0.5) / width}
        options |= {**mlp, "act_layer": nn.SiLU}
    if kind == "dinov2_with_registers":
        options |= {"reg_tokens": config.get("num_register_tokens", 4), "no_embed_class": True}
        if {"cls_token", "pos_embed"} <= weights.keys():  # timm's class token has no position
            positions = weights["pos_embed"]
            weights["cls_token"], weights["pos_embed"] = weights["cls_token"] + positions[:, :1], positions[:, 1:]
    if kind == "clip_vision_model":
        options |= {"pre_norm": True}
    if kind == "siglip_vision_model":
        options |= {"class_token": False, "global_pool": "map"}
    kept = VisionTransformerDistilled if distilled else VisionTransformer
    arch = record_of(partial(kept, **options), f"{LAYOUT}_{kind}")
    return dataclasses.replace(arch, feature_head=projected)


def _check_vit(kind: str, config: Mapping[str, Any], weights: Mapping[str, torch.Tensor], *, distilled: bool) -> None:
    """Raise UserError for what transformers has and timm's ViT has not."""
    head, width = weights.get("head.weight"), config["hidden_size"]
    if distilled and not {"head.weight", "head_dist.weight"} <= weights.keys():
        raise UserError(
            "the file has a distillation token and not both classifiers: save DeiTForImageClassificationWithTeacher"
        )
    if kind.startswith("dinov2") and head is not None and head.shape[1:] != (width,):
        raise UserError(
            "the classifier reads the class token and the mean of the patches, which no timm model has: save the "
            "backbone alone (model.dinov2.save_pretrained(FOLDER)), and train a head on it"
        )
    if kind == "siglip_vision_model" and not config.get("vision_use_head", True):
        raise UserError("vision_use_head = false: the model has no pool, so it has no one vector of features")


def _beit(config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Arch:
    """Read the record of a BEiT; biases that its blocks share become those of every block."""
    for name in list(weights):
        for theirs, ours in (("query", "q"), ("key", "k"), ("value", "v")):
            if f".attn.{theirs}." in name:
                weights[name.replace(f".attn.{theirs}.", f".attn.{ours}_proj.")] = weights.pop(name)
    shared = weights.pop("encoder.relative_position_bias.relative_position_bias_table", None)
    if shared is not None:
        names = [f"blocks.{i}.attn.rel_pos.relative_position_bias_table" for i in range(config["num_hidden_layers"])]
        weights |= {name: shared.clone() for name in names}
    make = partial(
        Beit,
        img_size=config.get("image_size", 224),
        patch_size=config["patch_size"],
        in_chans=config.get("num_channels", 3),
        num_classes=len(weights["head.weight"]) if "head.weight" in weights else 0,
        global_pool="avg" if config["use_mean_pooling"] else "token",
        embed_dim=config["hidden_size"],
        depth=config["num_hidden_layers"],
        num_heads=config["num_attention_heads"],
        mlp_ratio=(config["intermediate_size"] + 0.5) / config["hidden_size"],
        init_values=config["layer_scale_init_value"] or None,
        use_abs_pos_emb=bool(config.get("use_absolute_position_embeddings")),
        use_rel_pos_bias=bool(config.get("use_relative_position_bias")),
        use_shared_rel_pos_bias=bool(config.get("use_shared_relative_position_bias")),
        norm_layer=partial(LayerNorm, eps=config["layer_norm_eps"]),
    )
    return dataclasses.replace(record_of(make, f"{LAYOUT}_beit"), act=_activation(config))


def _swin(config: Mapping[str, Any], weights: dict[str, torch.Tensor]) -> Arch:
    """Read the record of a Swin; merging of patches is part of the stage behind it, as in timm."""
    if config.get("use_absolute_embeddings"):
        raise UserError("use_absolute_embeddings = true: timm's Swin has no positions of patches")
    if config["layer_norm_eps"] != USUAL["swin"]["layer_norm_eps"]:
        raise UserError(f"layer_norm_eps = {config['layer_norm_eps']}: the norms between stages have 1e-05")
    if _activation(config) != "gelu":
        raise UserError(f"hidden_act = {config['hidden_act']!r}: Swin has gelu here")
    for name in list(weights):
        match = re.fullmatch(r"layers\.(\d+)\.downsample\.(.*)", name)
        if match:
            weights[f"layers.{int(match[1]) + 1}.down.{match[2]}"] = weights.pop(name)
    for name in list(weights):
        new = re.sub(r"^head\.", "head.fc.", name.replace(".down.", ".downsample."))
        weights[new] = weights.pop(name)
    make = partial(
        SwinTransformer,
        img_size=config.get("image_size", 224),
        patch_size=config["patch_size"],
        in_chans=config.get("num_channels", 3),
        num_classes=len(weights["head.fc.weight"]) if "head.fc.weight" in weights else 0,
        embed_dim=config["embed_dim"],
        depths=tuple(config["depths"]),
        num_heads=tuple(config["num_heads"]),
        window_size=config["window_size"],
        mlp_ratio=config["mlp_ratio"],
        qkv_bias=bool(config.get("qkv_bias", True)),
    )
    return record_of(make, f"{LAYOUT}_swin")


def _activation(config: Mapping[str, Any]) -> str:
    act = config["hidden_act"]
    if act not in ACTS:
        raise UserError(f"hidden_act = {act!r}: must be one of {', '.join(ACTS)}")
    return ACTS[act]


def _preprocessing(given: Mapping[str, Any], config: Mapping[str, Any], arch: Arch) -> dict[str, Any]:
    """Return timm's description of the preprocessing, as far as the files tell, and the names of classes."""
    found: dict[str, Any] = {"mean": given.get("image_mean"), "std": given.get("image_std")}
    found["interpolation"] = {0: "nearest", 2: "bilinear", 3: "bicubic"}.get(given.get("resample", -1))
    size, crop = given.get("size"), given.get("crop_size")
    side = size.get("shortest_edge") if isinstance(size, Mapping) else size
    inner = crop.get("height") if isinstance(crop, Mapping) else crop
    if given.get("do_center_crop") and isinstance(side, int) and isinstance(inner, int) and side:
        found["crop_pct"] = inner / side
    elif given:
        found |= {"crop_pct": 1.0, "crop_mode": "squash"}  # resized to the images' size, whatever their shape
    labels = config.get("id2label") or {}
    names = [labels.get(str(i)) for i in range(arch.num_classes)]
    own = all(isinstance(name, str) and not name.startswith("LABEL_") for name in names)
    if names and own and not arch.headless and len(set(names)) == len(names):
        found["label_names"] = names
    return {key: value for key, value in found.items() if value is not None}


def _json(path: Path) -> dict[str, Any]:
    found = read_json(path, what="file")
    if not isinstance(found, dict):
        raise UserError(f"{path} holds a {type(found).__name__}, not a table of names and values")
    return found
