"""What a converted model can be exported as, one file a family of formats.

A target says which models have exactly its mathematics, and refuses the others with the reason:
`form` what of a model it looks at, `standard` what all architectures of transformers share,
`architectures` each of them, `peft` the folder of an adapter, `lint` what engines do otherwise.
"""
