"""The method of Prompt-to-Prompt in plain PyTorch: words, edits, tau, and what they do to attention.

One legend for the shapes everywhere in the pack:

    b  rows of a batch                      r  rows among them that are targets
    N  targets of an edit                   B  branches of a pair, N + 1; branch 0 is the source
    h  heads                                d  width of a head
    n  query tokens (pixels of a layer)     L  key tokens of a call
    t  text tokens of a conditioning        W  words or tokens whose maps are read

and one vocabulary: a *row* is one image of a batch; a *pair* is a source with its targets; a *branch* is one
of a pair's rows; a *chunk* is the part of a model call that computes one conditioning for every row; a *part*
is a subset of the targets that goes through the model together; a *step* is a place in the run's list of
sigmas; *own* is what is a target's and not its source's, or a chunk of the pair's positive conditioning.
"""
