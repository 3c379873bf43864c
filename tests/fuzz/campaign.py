"""The long run: `python -m fuzz.campaign 100000 1` tries that many mutants of a seed, and counts."""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from faulthandler import dump_traceback_later
from functools import partial
from pathlib import Path

from data_pipelines.samples.tokenizer import train_sentencepiece
from fuzz.configs import try_config
from fuzz.mutants import make_mutant
from fuzz.sources import try_source
from fuzz.trial import Bench, bounded_memory, try_mutant

HANG_S = 300.0
SHARDS_A_SOURCE = 4  # spoilt shards for each spoilt table or folder to pack, and for each spoilt config


def main(mutants: int, seed: int) -> None:
    kinds: Counter[str] = Counter()
    outcomes: Counter[str] = Counter()
    violations, longest_s, begin = 0, 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as name, bounded_memory():
        folder = Path(name)
        os.chdir(folder)
        train_sentencepiece((f"a red square above {number}" for number in range(500)), folder / "t.model", 40)
        bench = Bench.made(folder, folder / "t.model")

        def spoilt_shard(number: int) -> None:
            mutant = make_mutant(number, seed)
            kinds[mutant.kind] += 1
            try_mutant(bench, mutant, outcomes)

        few = mutants // SHARDS_A_SOURCE
        others = [(partial(subject, folder, seed, outcomes), few) for subject in (try_source, try_config)]
        trials = [(spoilt_shard, mutants), *others]
        for trial, number in ((trial, number) for trial, count in trials for number in range(count)):
            start = time.process_time()
            dump_traceback_later(HANG_S, exit=True)  # even in C code
            try:
                trial(number)
            except Exception:
                violations += 1
                print(f"== {number} of seed {seed}: {trial}", flush=True)
                traceback.print_exc()
            longest_s = max(longest_s, time.process_time() - start)
        os.chdir("/")
    for counts in (kinds, outcomes):
        for what, count in sorted(counts.items()):
            print(f"{count:9,} {what}")
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    took_s, core_s = time.monotonic() - begin, time.process_time()
    print(
        f"{mutants:,} mutants of seed {seed} in {took_s:.0f} s ({core_s:.0f} s of a core, {longest_s:.1f} s for the "
        f"longest); {peak_mib:,} MiB at the peak; {violations:,} violations"
    )
    sys.exit(violations > 0)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
