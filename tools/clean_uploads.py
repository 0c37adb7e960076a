"""Remove what killed processes left of uploads to S3: invisible parts of files, which take space.

python tools/clean_uploads.py s3://bucket/runs --older-than 24 [--dry-run]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


def main() -> int:
    """Parse the arguments, remove the uploads and print their paths."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('path', help='bucket or directory, s3://bucket/path')
    parser.add_argument(
        '--older-than', type=float, default=24, metavar='HOURS', help='only uploads that began so long ago (default 24)'
    )
    parser.add_argument('--dry-run', action='store_true', help='only print what would be removed')
    args = parser.parse_args()
    from lakonlab.storage.errors import StorageError
    from lakonlab.storage.s3_upload import clean_uploads

    try:
        paths = clean_uploads(args.path, 3600 * args.older_than, args.dry_run)
        for path in paths:
            print(path)
        verb = 'would be removed' if args.dry_run else 'removed'
        print(f'{len(paths)} unfinished uploads older than {args.older_than:g} h {verb}', file=sys.stderr)
    except StorageError as error:
        print(f'clean_uploads: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
