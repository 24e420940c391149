"""What routers choose: counts over data, beside what chance gives.

`analyze` is the door. `watching` sees the decisions of our layers and of transformers' mixtures,
`choices` counts them in one pass, `measures` says what they amount to, `chance` what would come
of documents whose domains were drawn at random, and `twin` of routers that know nothing.
"""
