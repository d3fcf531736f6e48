"""Operations on adapter files: convert, combine, extract, resize, inspect and compare. No base is loaded."""
