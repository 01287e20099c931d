from conversion.checkpoints.tensor_names import match_names


def test_names_match_with_and_without_the_models_prefix():
    stored = ["layers.0.w", "model.layers.1.w", "lm_head.weight", "layers.0.rotary_emb.inv_freq", "what.is.this"]
    wanted = ["model.layers.0.w", "layers.1.w", "lm_head.weight", "model.norm.weight"]
    found, missing, extra = match_names(stored, wanted, "model")
    assert found == {
        "model.layers.0.w": "layers.0.w",
        "layers.1.w": "model.layers.1.w",
        "lm_head.weight": "lm_head.weight",
    }
    assert missing == ["model.norm.weight"]
    assert extra == ["what.is.this"]
