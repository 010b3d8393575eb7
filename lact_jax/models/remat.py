"""What the backward pass finds saved instead of computing it again."""

import jax

_POLICIES = jax.checkpoint_policies
ATTENTION_PRIMITIVE = "dot_product_attention_fwd_wrapper"


def _is_attention(primitive, *_, **__) -> bool:
    # By primitive: saving only cuDNN's named output would still run its forward twice.
    return primitive.name == ATTENTION_PRIMITIVE


REMAT_POLICIES = {
    "full": _POLICIES.nothing_saveable,
    "attention": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("attention"), _is_attention
    ),
    # All that is dear to compute but the wide FFN activations, which are dear to keep.
    "selective": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("attention", "qkv", "fast_weights", "ffn"), _is_attention
    ),
    # What is inside the fast weights' scan is computed again; no other matmul and no attention is.
    "dots": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("attention", "fast_weights"),
        _POLICIES.save_from_both_policies(
            _POLICIES.dots_with_no_batch_dims_saveable, _is_attention
        ),
    ),
    # Nor is one inside of them, where their chunks are unrolled.
    "all_dots": _POLICIES.save_from_both_policies(
        _POLICIES.save_only_these_names("attention", "fast_weights", "hidden"),
        _POLICIES.save_from_both_policies(
            _POLICIES.dots_with_no_batch_dims_saveable, _is_attention
        ),
    ),
}
