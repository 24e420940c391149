"""What the studies share: sessions of training, queues of runs, tables, clocks. Knows no study."""
