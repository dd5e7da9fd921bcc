"""The named shapes, as data: `MiniMindConfig.from_preset(name)` builds one, --preset picks one."""


def shape(
    width: int, layers: int, feed_forward: int, heads: int, kv_heads: int, **more: object
) -> dict[str, object]:
    """The fields of a MiniMindConfig."""
    return {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "intermediate_size": feed_forward,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


SHARED_EXPERT = dict(shared_expert_intermediate_size=1728, norm_topk_prob=True)

PRESETS = {  # width, layers, feed-forward, query heads, key/value heads
    "tiny": shape(192, 4, 512, 4, 2, qk_norm=True),
    "minimind2-small": shape(512, 8, 1408, 8, 2),
    "minimind2": shape(768, 16, 2048, 8, 2),
    "minimind2-moe": shape(
        640, 8, 1728, 8, 2, num_experts=4, num_experts_per_tok=2, **SHARED_EXPERT
    ),
    "minimind-3": shape(768, 8, 2432, 8, 4, qk_norm=True),
    "minimind-3-moe": shape(768, 8, 2432, 8, 4, qk_norm=True, num_experts=4, num_experts_per_tok=1),
}
