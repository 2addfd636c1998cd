"""How much the tests prove: small errors are put into the code, and some test should tell of each.

    python -m tests.mutants map --store map.json
    python -m tests.mutants run --map map.json --store results.jsonl
    python -m tests.mutants table results.jsonl

With `--tree` they do the same for the tests of another checkout, so that two suites can be set side by side.

The errors (mutants) are those of cosmic-ray, of which a sample is drawn (`catalogue`). For each, the tests
run that come by its line (`coverage_map`), until one fails (`trial`), in a forked process (`child`) that
finds a copy of the tree (`workshop`). `survivors.toml` says why some survive.
"""
