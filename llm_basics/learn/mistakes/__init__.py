"""The catalogue of mistakes, one file a step: the probes of the step, and wrong versions that learners write.

A probe is an input on which an implementation is observed: what comes out, its dtype, the gradients, what it
changed, how it failed. A mistake is an executable wrong version of one of the step's pieces.
"""
