"Rival methods, all given a `BlockTask`; none of them imports another."
