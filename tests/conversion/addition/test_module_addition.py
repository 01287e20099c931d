"""Which rows a matrix has after one more expert: every expert still finds those that it read."""

import torch

from conversion.addition.module_addition import ModuleAddition, with_expert


def test_every_expert_finds_its_rows():
    """Stored rows stay apart from each other and from the new expert's own, and a channel that one lacks has none."""
    generator = torch.Generator().manual_seed(0)
    channels, place = 40, 1
    # Two rows of each channel are stored before, and the new expert reads one of them or its own.
    stored = 2 * torch.arange(channels) + torch.randint(0, 2, (2, channels), generator=generator)
    own = torch.rand(channels, generator=generator) < 0.5
    new = torch.where(own, 2 * channels + torch.arange(channels), stored[0])
    index = with_expert(stored, new, place)
    present = torch.rand(3, channels, generator=generator) < 0.8
    module = ModuleAddition(
        index=index,
        present=present,
        num_stored=2 * channels,
        place=place,
        fallback=None,
        needs_fallback=True,
        delta_square=None,
        error_square=0.0,
    )
    layout = module.layout()
    sources = module.sources(layout)
    assert torch.equal(index[present], sources[layout.channel_index[present].long()])
    assert torch.equal(module.channel_index(layout, is_embedding=False) >= 0, present)
    assert (module.channel_index(layout, is_embedding=True)[~present] == len(sources)).all()
    assert len(sources.unique()) == len(sources) == module.num_rows - 1
    assert module.num_new == int((sources >= 2 * channels).sum()) == int((own & present[place]).sum())
    assert module.num_reused == int((~own & present[place]).sum())
    assert sum(module.rows_by_owners.values()) == len(sources)
