"""What every subpackage uses: finished work, processes, tables, errors."""
