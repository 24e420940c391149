"""MoV, MoLORA, SMoLA and their dense baselines on P3: does routing beat the matched LoRA?"""
