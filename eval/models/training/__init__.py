"""How the embedded models were trained; not part of the wheel. Read `recipe`, then `train`, `train_next` and
`train_qwen`."""
