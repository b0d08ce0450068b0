# A toolchain file: aarch64 Linux from another machine, where qemu runs the tests. Debian and Ubuntu have both in
# g++-aarch64-linux-gnu and qemu-user.
#
#   cmake -S . -B build/aarch64 -G Ninja --toolchain cmake/aarch64.cmake

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64 -L /usr/aarch64-linux-gnu)
set(CMAKE_FIND_ROOT_PATH_MODE_PROGRAM NEVER)
