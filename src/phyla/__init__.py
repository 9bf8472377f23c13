"""phyla finds the classes in images that nobody has labelled.

    images -> pretrain -> encoder -> embed -> neighbors -> cluster -> refine -> classifier, report
    (ids + pixels)                   (n, d)    (n, k)      (n, K)     (n, K)
                                                   true labels -> evaluate -> scores

Every arrow is one named, saved, typed array; every box is one folder or one file. Nothing heavy is imported here.
"""

__version__ = "0.1.0"
