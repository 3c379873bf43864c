"""The layouts that must take the same steps, save for one another, and be listed in the README."""

# name -> the ranks it runs on, and what the config says of it.
LAYOUTS = {
    **{f"ZeRO-{stage}, 1 rank": ("one_rank", {"engine__zero_stage": stage}) for stage in range(4)},
    **{f"ZeRO-{stage} x dp 2": ("two_ranks", {"engine__zero_stage": stage}) for stage in range(4)},
    **{f"ZeRO-{stage} x dp 4": ("four_ranks", {"engine__zero_stage": stage}) for stage in (0, 3)},
    **{
        f"ZeRO-{stage} x tp 2{name}": (ranks, {"engine__zero_stage": stage, "engine__tensor_parallel": 2})
        for name, ranks in (("", "two_ranks"), (" x dp 2", "four_ranks"))
        for stage in range(4)
    },
    **{
        f"ZeRO-{stage} x {name}": (
            ranks,
            {"engine__zero_stage": stage, "engine__pipeline_parallel": stages, "engine__tensor_parallel": tp},
        )
        for name, ranks, stages, tp in (
            ("pp 2", "two_ranks", 2, 1),
            ("pp 2 x dp 2", "four_ranks", 2, 1),
            ("pp 2 x tp 2", "four_ranks", 2, 2),
            ("pp 4", "four_ranks", 4, 1),
        )
        for stage in (0, 1)
    },
}
