# libpare.a: what the functions of pare.h need and nothing else, as one object whose other symbols are local. Templates
# that many sources instantiate are in it once, and nothing in it can clash with the program that it is linked into.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)

set_property(DIRECTORY APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS runtime/pare.h)
file(READ runtime/pare.h PARE_HEADER)
string(REGEX MATCHALL "pare_[a-z_]+\\(" PARE_FUNCTIONS "${PARE_HEADER}")
string(REPLACE "(" "" PARE_FUNCTIONS "${PARE_FUNCTIONS}")
list(REMOVE_DUPLICATES PARE_FUNCTIONS)
list(JOIN PARE_FUNCTIONS "\n" PARE_FUNCTION_LINES)
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/embed/functions.txt CONTENT "${PARE_FUNCTION_LINES}\n")
list(TRANSFORM PARE_FUNCTIONS PREPEND "--undefined=" OUTPUT_VARIABLE PARE_ROOTS)

add_custom_command(OUTPUT embed/pare.o
  COMMAND ${CMAKE_LINKER} -r --gc-sections --force-group-allocation ${PARE_ROOTS} -o embed/parts.o
    $<TARGET_FILE:pare_runtime> $<TARGET_FILE:pare_core>
  COMMAND ${CMAKE_LINKER} -r -T ${CMAKE_SOURCE_DIR}/runtime/embed.ld -o embed/whole.o embed/parts.o
  # GNU's unique symbols cannot be made local: names of their own.
  COMMAND sh -c "${CMAKE_NM} embed/whole.o | awk '$2 == \"u\" {print $3 \" pare_unique_\" NR}' >embed/unique.txt"
  COMMAND ${CMAKE_OBJCOPY} --redefine-syms=embed/unique.txt embed/whole.o embed/named.o
  COMMAND ${CMAKE_OBJCOPY} --strip-unneeded --keep-global-symbols=embed/functions.txt embed/named.o embed/pare.o
  DEPENDS pare_runtime pare_core embed/functions.txt runtime/embed.ld
  WORKING_DIRECTORY ${CMAKE_BINARY_DIR}
  COMMENT "Linking what an embedded runtime needs" VERBATIM)
add_library(pare_embed STATIC EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/embed/pare.o)
set_source_files_properties(${CMAKE_BINARY_DIR}/embed/pare.o PROPERTIES EXTERNAL_OBJECT ON GENERATED ON)

# Programs in C link it without a C++ compiler: the C++ library is named.
set(PARE_CXX_LIBRARIES ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER PARE_CXX_LIBRARIES INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+|c\\+\\+abi|m)$")
list(REMOVE_DUPLICATES PARE_CXX_LIBRARIES)
if(PARE_OPENMP)
  list(PREPEND PARE_CXX_LIBRARIES ${OpenMP_CXX_LIB_NAMES})
endif()
set_target_properties(pare_embed PROPERTIES OUTPUT_NAME pare EXPORT_NAME runtime LINKER_LANGUAGE CXX)
target_include_directories(pare_embed INTERFACE $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
target_link_libraries(pare_embed INTERFACE
  PkgConfig::PARE_PCRE2 PkgConfig::PARE_UTF8PROC Threads::Threads ${PARE_CXX_LIBRARIES})

set(PARE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/pare)
write_basic_package_version_file(${CMAKE_BINARY_DIR}/embed/pare-config-version.cmake COMPATIBILITY SameMinorVersion)
file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/embed/pare-config.cmake @ONLY CONTENT [[
include(CMakeFindDependencyMacro)
find_dependency(Threads)
find_dependency(PkgConfig)
foreach(package PCRE2:libpcre2-8 UTF8PROC:libutf8proc)
  string(REPLACE ":" ";" package ${package})
  list(GET package 0 name)
  list(GET package 1 module)
  if(NOT TARGET PkgConfig::PARE_${name})
    pkg_check_modules(PARE_${name} REQUIRED IMPORTED_TARGET ${module})
  endif()
endforeach()
include(${CMAKE_CURRENT_LIST_DIR}/pare-targets.cmake)
]])
install(TARGETS pare_embed EXPORT pare ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR})
install(FILES runtime/pare.h DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(EXPORT pare NAMESPACE pare:: FILE pare-targets.cmake DESTINATION ${PARE_CMAKE_DIR})
install(FILES ${CMAKE_BINARY_DIR}/embed/pare-config.cmake ${CMAKE_BINARY_DIR}/embed/pare-config-version.cmake
  DESTINATION ${PARE_CMAKE_DIR})
