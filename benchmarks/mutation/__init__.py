"""Whether the tests would notice: faults planted in the code one at a time.

    python -m benchmarks.mutation cover --jobs 2          # which test runs which line
    python -m benchmarks.mutation run --jobs 2            # plant each fault and run those tests

`operators` makes faults from the syntax tree, `named` lists those that a reviewer thought of.
"""
