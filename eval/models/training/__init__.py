"""How the embedded models were trained; not part of the wheel. Read `recipe`, then `train`, and the others after it."""
