"""The catalogue of mistakes, one file a step: the probes of the step, and wrong versions that learners write.

A probe is an input for an implementation, of which the output, its dtype, gradients, modified inputs or an
error are observed. A mistake is an executable wrong version of one of the step's pieces.
"""
